"""Several processes that train together, and what FSDP2 and DeepSpeed need of a model.

`processes.Processes` is what other rooms use: who is first, what is done once, what is gathered.
"""
