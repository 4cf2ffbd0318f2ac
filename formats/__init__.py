"""Read and write strangers' formats: data sets, tokenizers, model folders, answer files."""
