"""The sweep of `unitscale coord_check`: sizes of activations against width and depth."""
