"""Opens what the training batches of a run are taken from: a data set, a stream, or samples of its own policy."""

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from halos.config.bind import LossSpec
from halos.config.schema import Config
from halos.run.batch_source import BatchSource, DatasetSource, PolicySource
from halos.run.stream_source import StreamSource


def open_batch_source(
    config: Config, loss: LossSpec, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, max_length: int
) -> BatchSource:
    """Read and check the training and evaluation data. Raises UserError for data that cannot be used."""
    of_files = StreamSource if config.data.stream else DatasetSource
    source = of_files if config.online is None else PolicySource
    return source(config, loss, tokenizer, accelerator, max_length)
