"""Ablations: settings of a training compared by what comes of them, each with several seeds.

cells.py    what a study is, as data: parts of cells, the runs that each needs, and how these are asked
parts.py    the study of launch/study.py: the paper's ablations in miniature
results.py  what was found, in study.json
run.py      trains and asks what is not there yet
report.py   tables and curves
"""
