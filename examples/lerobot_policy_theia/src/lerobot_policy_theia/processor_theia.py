"""What LeRobot does to a batch before the policy, and to its actions afterwards."""

from typing import Any

import torch
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

from lerobot_policy_theia.configuration_theia import TheiaConfig

Preprocessor = PolicyProcessorPipeline[dict[str, Any], dict[str, Any]]
Postprocessor = PolicyProcessorPipeline[PolicyAction, PolicyAction]


def make_theia_pre_post_processors(
    config: TheiaConfig, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[Preprocessor, Postprocessor]:
    """Both pipelines. LeRobot finds this function by its name.

    Args:
        config: Of the policy.
        dataset_stats: Mean and standard deviation of state and action, by feature.

    Returns:
        One that normalises observations, and one that gives actions their units back, on the CPU.
    """
    scale: dict[str, Any] = {"norm_map": config.normalization_mapping, "stats": dataset_stats}
    features = config.input_features | config.output_features
    before = Preprocessor(
        name=POLICY_PREPROCESSOR_DEFAULT_NAME,
        steps=[
            RenameObservationsProcessorStep(rename_map={}),
            AddBatchDimensionProcessorStep(),
            DeviceProcessorStep(device=config.device),
            NormalizerProcessorStep(features=features, device=config.device, **scale),
        ],
    )
    after = Postprocessor(
        name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
        steps=[UnnormalizerProcessorStep(features=config.output_features, **scale), DeviceProcessorStep(device="cpu")],
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    return before, after
