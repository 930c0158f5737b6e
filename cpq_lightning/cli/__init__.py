"""The command ``cpq``: fit, validate, test, predict, export, report, doctor. May import pytorch_lightning and below."""
