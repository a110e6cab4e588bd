"""Training of the embedded models: ``python -m medsteer_core.endophantom.train --help``."""
