"""The command `python -m halos.losses.certify`; its checks are in halos/certify."""
