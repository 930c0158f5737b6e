"""Runs that are resumed, of the callbacks whose state a checkpoint holds."""

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.models import data

LOADERS = (data(shuffle=False), data(shuffle=False))


def assert_resumes_exactly(fit, folder, make, callbacks, epoch=1):
    """A run of four epochs that is resumed behind one of them ends as the whole run does; its callbacks are returned.

    ``make`` makes the module, and ``callbacks`` the callbacks of a run.
    """

    def fresh():
        torch.manual_seed(0)
        return make()

    whole, resumed = fresh(), make()
    fit(whole, callbacks(), max_epochs=4, loaders=LOADERS)
    saver = ModelCheckpoint(folder / "saved", filename="{epoch}", save_top_k=-1)
    fit(fresh(), [*callbacks(), saver], max_epochs=4, loaders=LOADERS, enable_checkpointing=True)
    last = callbacks()
    fit(resumed, last, max_epochs=4, loaders=LOADERS, ckpt_path=folder / "saved" / f"epoch={epoch}.ckpt")
    for name, value in whole.state_dict().items():
        assert value.equal(resumed.state_dict()[name]), name
    return last
