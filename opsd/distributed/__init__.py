"""Runs several processes that train together, and prepares the model for FSDP2 or DeepSpeed.

Other rooms use `processes.Processes`: which process is first, what runs once, what is gathered.
"""
