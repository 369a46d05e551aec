"""Models from elsewhere: pulled from a hub or imported from a disk, checked, prepared, published, and kept offline.

``pull``, ``importing`` and ``prepare`` make a model folder of safetensors with a manifest and publish it by its content
hash to the store or to a plain folder; ``lock`` writes down which commit of which model that was; ``cache`` brings a
published model to the machine of a step. Only ``pull`` ever asks a hub.
"""
