"""The commands that train and test policies: their options, checked before anything heavy is loaded."""

from pathlib import Path

from benchmarks.cortexbench.presets import Features, PresetName
from benchmarks.cortexbench.simulation import check_installed
from theia.errors import ConfigError
from theia.policies import HeadKind
from theia.utils.arguments import MOST_PROCESSES, check_number
from theia.utils.device import Device, choose_device, core_count
from theia.utils.files import check_folder

_MOST_ROLLOUTS = 1000
_MOST_CHUNK = 1000
_ENCODER_RATE = 1e-5


def run(
    encoders: list[str],
    data: Path,
    out: Path,
    tasks: str | None = None,
    preset: PresetName = "small",
    vary: str | None = None,
    rollouts: int | None = None,
    seeds: str | None = None,
    epochs: int | None = None,
    features: Features = "spatial",
    shift: str | None = None,
    head: HeadKind = "mlp",
    chunk: int | None = None,
    execute: int | None = None,
    finetune: bool = False,
    encoder_learning_rate: float | None = None,
    videos: int = 0,
    reference: str | None = None,
    workers: int | None = None,
    batch_size: int = 32,
    device: Device = "auto",
) -> str:
    """Trains policies on frozen encoders from demonstrations, and measures how well they do in the simulator.

    Besides encoders, there are three controls: blind is given the robot's own state and no picture, state is given the
    whole state of the simulator, pixels sees 16x16 mean colours. random:theia_tiny is a student untrained, teacher:hog
    needs no weights. All policies act from the same initial states. After an interruption, the same command goes on
    where it stopped; encoders, tasks and seeds can be added to a finished run.

    Args:
        encoders: Encoders and controls to compare.
        data: Folder with demonstrations, which the command collect records, or import reads.
        out: Folder for the policies, the rollouts, the report and the embeddings.
        tasks: Names of tasks, separated by commas; by default, all that there are demonstrations of. smoke takes the
            first.
        preset: full is the paper's protocol: all tokens, 100 epochs, 3 seeds, 20 evaluations of 25 rollouts of the
            task's whole length; hours per encoder and task. small gives the policy 24 principal components of the
            tokens, on at most 16x16 places, 25 epochs and one seed, and tests it once, on 25 rollouts: of 150 steps in
            MetaWorld, which end earlier where the task stays fulfilled, of 300 in DM Control, and of all in Adroit.
            smoke shows in a minute or two that everything works, and nothing else.
        vary: What differs between rollouts: any of camera, light, texture and distractor, separated by commas, or
            none. By default, what differs between demonstrations.
        rollouts: Number of rollouts at each evaluation, in place of the preset's.
        seeds: Seeds of the training, separated by commas, in place of the preset's.
        epochs: Number of epochs, in place of the preset's; the policy then acts after half of them and after the last.
        features: spatial gives patch tokens to the paper's convolutions; vector gives the CLS token, or else the mean
            of the patch tokens, to its MLP.
        shift: What looks different in a second test of the finished policies, each by itself: any of camera, light,
            texture and distractor, separated by commas. Demonstrations must not vary it.
        head: mlp is the paper's for CortexBench: one action, mean squared error. chunk is that of its WidowX arm: the
            next actions at once, smooth L1, AdamW. diffusion is that of its Spot: the next actions sampled by a
            diffusion model; 3,000 updates, unless --epochs or smoke says otherwise.
        chunk: Number of actions that the head predicts at once; by default, 10 for chunk and 4 for diffusion.
        execute: Number of those that are carried out before the next look; by default, all.
        finetune: Train each encoder together with each of its policies. It must be a Theia model; controls stay as
            they are. Every update decodes its frames and encodes them twice, which takes hours without a GPU.
        encoder_learning_rate: Learning rate of an encoder that is trained; 0.00001 by default.
        videos: Number of rollouts of each finished policy that are written to mp4, with what the policy sees of them.
        reference: Encoder that the others are compared with; by default, the first one that is no control.
        workers: Number of simulator processes; by default, as many as there are cores.
        batch_size: Number of frames that are given to an encoder together when demonstrations are embedded.
        device: Device that encoders and policies run on; auto takes a GPU if there is one.

    Returns:
        The report.

    Raises:
        ConfigError: If an option is wrong, the folder holds another run or is in use, or the simulator is missing.
        TrajectoryError: If the demonstrations cannot be read, or lack what is needed.
        SimulationError: If a simulation fails.
    """
    check_installed()
    check_number("rollouts", rollouts, 2, _MOST_ROLLOUTS)
    check_number("epochs", epochs, 2)
    check_number("videos", videos, 0)
    check_number("workers", workers, 1, MOST_PROCESSES)
    check_number("batch_size", batch_size, 1)
    check_number("chunk", chunk, 1, _MOST_CHUNK)
    check_number("execute", execute, 1, _MOST_CHUNK)
    if encoder_learning_rate is not None and not finetune:
        raise ConfigError("--encoder_learning_rate is about encoders that are trained. Add --finetune.")
    check_number("encoder_learning_rate", encoder_learning_rate, 0, 1, above=True, below=True)
    rate = _ENCODER_RATE if encoder_learning_rate is None else encoder_learning_rate
    check_folder(out, "--out")

    # torch takes seconds to import, and recording demonstrations does not need it.
    from benchmarks.cortexbench import running
    from benchmarks.cortexbench.run_plan import Learner

    return running.run(
        encoders, data, out, tasks, preset, vary, rollouts, seeds, epochs, features, shift, videos, reference,
        workers or core_count(), batch_size, choose_device(device),
        Learner(head, chunk, execute, rate if finetune else None),
    )  # fmt: skip


def export(policy: Path, out: Path) -> str:
    """Writes one trained policy of a run into a folder of its own, which theia.load_policy reads on a robot.

    The folder holds the encoder, too, if it is a Theia model; another one is kept by its name.

    Args:
        policy: Folder of the policy in that of the run: RUN/policies/ENCODER/TASK/seed-NUMBER.
        out: Folder to create.

    Returns:
        The folder.

    Raises:
        ConfigError: If there is no finished policy, or its encoder has changed since.
        ExportError: If the folder holds something, or cannot be written.
    """
    check_folder(out, "--out")

    from benchmarks.cortexbench import exporting

    return exporting.export(policy, out)


def report(folder: Path, reference: str | None = None) -> str:
    """Says how often the policies of a run succeeded, finished or not, and writes it down with pictures.

    If encoders are students of a sweep, a file scores-SWEEP.csv is written too, which adds the figures to the sweep's
    own report: theia ablate report SWEEP --scores FILE.

    Args:
        folder: Folder of the run.
        reference: Encoder that the others are compared with; by default, the first one that is no control.

    Returns:
        Tables, with what must be known to read them.

    Raises:
        ConfigError: If the folder holds no finished policy, or none of that encoder.
    """
    from benchmarks.cortexbench import reporting

    return reporting.report(folder, reference)
