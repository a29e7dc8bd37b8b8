"""What a run needs of hardware that is not there: the real step, compiled for it.

hardware.py   topologies by name, and the memory of their devices
plan.py       a config's train step compiled for one of them: bytes by kind, checks, time; report.py prints it
least.py      state and weights by shapes alone: a lower bound, without a compiler
predict.py    how long a compiled step takes by its own FLOPs, bytes and collectives; rates.py has what it assumes
serving.py    generation's functions compiled for one device
"""
