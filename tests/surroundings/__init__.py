"""Other people's surroundings: what a machine, a shell or another plugin does to a run, and how it goes on. In two minutes at most."""
