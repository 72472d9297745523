"""From representations to answers: corpora, encoding jobs, containers, indexes, exchange formats, evaluation."""

from rarezoo.retrieval.sparse_embeddings import SparseEmbeddings as SparseEmbeddings
