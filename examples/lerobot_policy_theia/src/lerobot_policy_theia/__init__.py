"""A LeRobot policy that sees with a Theia encoder. Importing it registers ``--policy.type theia``."""

from lerobot_policy_theia.configuration_theia import TheiaConfig
from lerobot_policy_theia.modeling_theia import TheiaPolicy
from lerobot_policy_theia.processor_theia import make_theia_pre_post_processors

__all__ = ["TheiaConfig", "TheiaPolicy", "make_theia_pre_post_processors"]
