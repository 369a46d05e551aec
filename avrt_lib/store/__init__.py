"""The object store: the server of the embedded default, models by content, and checkpoints of a running training.

The store is named by the environment (``AVRT_S3_ENDPOINT`` …), so that a step reaches the same place whether the server
was started beside it or stands in a cluster.
"""

from avrt_lib.store.checkpoints import CheckpointSink, checkpoint_sink, latest_checkpoint, push_checkpoint
from avrt_lib.store.objects import ModelPlace, S3Settings, client, download_model, local_root, publish_model
from avrt_lib.store.server import LocalObjectServer

__all__ = [
    "CheckpointSink",
    "LocalObjectServer",
    "ModelPlace",
    "S3Settings",
    "checkpoint_sink",
    "client",
    "download_model",
    "latest_checkpoint",
    "local_root",
    "publish_model",
    "push_checkpoint",
]
