"""Which cluster is meant, and with whose credentials."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from avrt_lib.errors import EnvironmentProblem

if TYPE_CHECKING:
    from kubernetes.client import Configuration


def client_settings() -> Configuration:
    """The client's settings for the cluster that KUBECONFIG names, or ~/.kube/config, or else this pod's own.

    Raises:
        EnvironmentProblem: where nothing names a cluster, or what does cannot be read.
    """
    from kubernetes import client, config

    settings, named = client.Configuration(), os.environ.get("KUBECONFIG")
    try:
        # Not the client's load_config: it knows no list of files, and says on standard output where it looked.
        if named or Path("~/.kube/config").expanduser().exists():
            config.load_kube_config(named or None, client_configuration=settings)
        else:
            config.load_incluster_config(client_configuration=settings)
    except (config.ConfigException, OSError, yaml.YAMLError, TypeError) as error:  # TypeError: YAML that is no mapping
        text = " ".join(str(error).split())
        mend = f"correct KUBECONFIG, which is {named}" if named else "set KUBECONFIG"
        raise EnvironmentProblem(f"There is no cluster to talk to ({text.rstrip('.')}): {mend}.") from error
    return settings
