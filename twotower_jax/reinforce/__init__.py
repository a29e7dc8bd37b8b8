"""Reinforcement of a denoiser on rewards that a program can compute, in one process.

questions.py  what is asked: questions of the tasks or of a file
rewards.py    what an answer is worth: Python functions by name
rollouts.py   answers sampled by the engine, and every step of them as rows of the training pass
policy.py     the probability of what the steps revealed, the advantages, the clipped objective
loop.py       the run: sample, reward, update, save
"""
