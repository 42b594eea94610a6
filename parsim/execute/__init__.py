"""A plan run for real: ranks of torch.distributed on this machine, timed and checked.

The parent process starts one worker a rank with torchrun and turns what they write into a Measurement
or a Verification (launch, watch, measurement). Workers need torch and the standard library alone.
"""
