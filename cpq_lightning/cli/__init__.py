"""The command ``cpq``."""
