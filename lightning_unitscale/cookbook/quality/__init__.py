"""The sweep of `unitscale quality`: its runs, what they show, its table and page."""
