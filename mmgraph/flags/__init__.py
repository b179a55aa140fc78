"""The flags of a run, in groups. :class:`mmgraph.config.Config` joins and checks them."""
