"""The configuration of a run: one YAML file, strict, with units in the names.

``sections`` holds the sections and their defaults, ``loading`` reads files, overrides and the pipeline's parameter, and
``errors`` words what is wrong in a document.
"""

from avrt_lib.config.loading import MODELS_LOCK, from_json, load, parse_set, read_mapping, validated
from avrt_lib.config.sections import (
    CORRECTION,
    HUB,
    OURS,
    PAPER,
    Config,
    DataConfig,
    DeploymentConfig,
    EngineConfig,
    GrpoConfig,
    LoraConfig,
    OptimizerConfig,
    RewardConfig,
    Section,
    SftConfig,
    SourceConfig,
    StoreConfig,
    StudentConfig,
    TeacherConfig,
)

__all__ = [
    "CORRECTION",
    "HUB",
    "MODELS_LOCK",
    "OURS",
    "PAPER",
    "Config",
    "DataConfig",
    "DeploymentConfig",
    "EngineConfig",
    "GrpoConfig",
    "LoraConfig",
    "OptimizerConfig",
    "RewardConfig",
    "Section",
    "SftConfig",
    "SourceConfig",
    "StoreConfig",
    "StudentConfig",
    "TeacherConfig",
    "from_json",
    "load",
    "parse_set",
    "read_mapping",
    "validated",
]
