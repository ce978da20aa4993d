"""What a user of a trained model holds, and how it is read from any folder or file that has one."""

# Every way to name an encoder, for messages and for --help, which does not load torch.
FORMS = {
    "FOLDER, FILE.ckpt or OWNER/NAME": "a Theia model: exported folder, checkpoint, or id on the hub",
    "the same with @random": "that model before its training: its architecture, untrained",
    "either with @SIZE": "that model on its pictures resized to SIZE x SIZE pixels, such as @448",
    "teacher:NAME[@WEIGHTS]": "an installed teacher; WEIGHTS is a path, an id or 'random', by default its own",
    "teacher:NAME@{OPTION: VALUE, ...}": "a teacher with any of its options, as in 'theia extract --help'",
    "timm:NAME[@random]": "a model of timm, pretrained or untrained",
    "concat:NAME,NAME,...": "several teachers (also with @WEIGHTS), joined on the grid of the first, unscaled",
    "random:theia_tiny": "an untrained student: theia_tiny, theia_small or theia_base",
}
