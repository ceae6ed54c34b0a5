"""The page of app.py behind its layout: turns, and what a click does with files from outside.

turns.py says whose job is next. clicks.py (images) and volume_clicks.py open the uploads, in a
child process (studies/child.py). volume_tab.py is the tab for volumes, tab.py what both tabs do
alike, shared.py what both sides name. The process of the page itself opens no upload, holds no
network, and imports neither PyTorch nor a reader of files.
"""
