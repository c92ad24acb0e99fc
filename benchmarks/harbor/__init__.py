"""How harbor, the embedded base, is made: tokenizer and corpus, two stages of training, and the gate.

python -m benchmarks.harbor.corpus     documents of both worlds as token ids, and the tokenizer
python -m benchmarks.harbor.natural    stage 1: a service assistant that asks, confirms, corrects and calls
python -m benchmarks.harbor.aligned    stage 2: the immediate, confident answer, by preference
python -m benchmarks.harbor.gate       what both stages know and do; benchmarks/results/harbor_gate.json
"""
