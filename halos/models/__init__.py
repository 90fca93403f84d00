"""Loading of models: policies, references, reward models, adapters and tokenizers."""
