"""The Kubeflow Pipelines components of AVRT: one folder per step, each a thin signature around ``avrt_lib``."""
