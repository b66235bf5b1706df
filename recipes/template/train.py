"""Train the model of module.py on the text of data.py, as conf/train.yaml says.

python train.py                                  # with unit scaling
python train.py '~callbacks.unitscale'           # the untouched model, to compare
python train.py callbacks.unitscale.format=fp8 module.width=256 data.folder=my_texts 'data.pattern="**/*.txt"'
"""

import hydra
import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_unitscale.hydra_plugin.messages import in_one_message


@in_one_message  # what is wrong with a setting, and what may have been meant
@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Trains, and returns the held-out loss, which `-m` with a sweeper minimizes."""
    pl.seed_everything(cfg.seed)
    callbacks = [instantiate(callback) for callback in (cfg.callbacks or {}).values()]
    trainer = instantiate(cfg.trainer, callbacks=callbacks)
    module, data = instantiate(cfg.module), instantiate(cfg.data)
    trainer.fit(module, data, ckpt_path=cfg.ckpt_path)
    for callback in callbacks:
        if plan := getattr(callback, "plan", None):
            print(plan.summary())
    loss = float(trainer.validate(module, data, verbose=False)[0]["val/loss"])
    kept = trainer.checkpoint_callback
    print(f"held-out loss {loss:.3f} nats per byte; checkpoint {kept.best_model_path or kept.last_model_path}")
    return loss


if __name__ == "__main__":
    main()
