#!/bin/sh
# The study on SmolLM2-135M and reasoning-gym's gsm_symbolic: cold start, distillation's teacher, then four methods with three
# seeds at 1 000 000 tokens each (generated; SFT: trained). For a GPU; what is finished is not run again.
set -e
for run in cold-start teacher; do
    [ -f runs/gsm/$run/summary.json ] || opsd train examples/gsm/$run.yaml
done
opsd compare examples/gsm/opsd.yaml examples/gsm/grpo.yaml examples/gsm/sft.yaml examples/gsm/distill.yaml \
    --seeds 0,1,2 --tokens 1000000 --output runs/gsm/study
