"""The sub-commands of ``pumice``, one file each: ``add_parser`` declares it, ``run`` does it."""
