"""A study: many pairs, each fused as test_asfe.py would, and a report of them all.

`study.py` is the command. cases.py finds the pairs and checks them, run.py fuses one in a worker
and knows what is done, report.py writes the table and the page. They are a room of their own
because a worker, maybe on another machine, imports run.py and nothing of the command.

child.py is for anything that may crash: a process with limits, for a case, or a click on the page.
"""
