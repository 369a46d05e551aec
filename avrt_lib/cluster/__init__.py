"""What a run needs to know of a cluster: profiles, checks, and what goes to and comes from the pods of a run."""
