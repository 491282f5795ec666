"""Which methods hold on which of transformers' architectures: `python -m petune_bench.coverage --out FOLDER`."""
