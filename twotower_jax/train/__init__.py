"""Training: one config, one pure step, one loop.

config.py      every setting of a run, checked once and then frozen
schedule.py    learning rate and block size as functions of the step
objectives.py  what is trained and its loss: a backbone on next tokens, a two-tower model on masked ones
step.py        state, optimizer, and the pure functions (state, frozen, batch) → (state, metrics) and validation
start.py       what a run starts from: tokenizer, model shape, parameters, data
metrics.py     losses summed between log lines, metrics.jsonl, TensorBoard, the progress line
flops.py       the arithmetic of a step, for the utilization; watch.py: memory and profiles; samples.py: texts
placement.py   where a run's arrays lie: its mesh, the rows of a batch that each process reads
skips.py       steps whose loss is not finite: how many, and whose fault
distributed.py several processes as one run; supervisor.py and stopping.py: how they end
loop.py        the run itself, from first batch to last checkpoint
"""
