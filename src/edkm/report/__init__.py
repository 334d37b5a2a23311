"""`edkm report`: a packed model as one HTML file that needs nothing else: no network, no scripts, no fonts.

Read: `record` (what a run writes down), `subject` (what is known about a directory), `svg` and `charts` (how it is drawn), `page` (how it
is said). Nothing is made up: what was not recorded or measured is said to be missing.
"""
