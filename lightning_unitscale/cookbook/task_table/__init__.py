"""The sweep of `unitscale tasks`: its runs, what they show, its table and page."""
