"""Small learnable problems of many kinds, each a LightningModule with its own data: what `unitscale quality` trains."""
