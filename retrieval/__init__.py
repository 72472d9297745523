"""From representations to answers: corpora, encoding jobs, containers, indexes, exchange formats, evaluation."""

from rarezoo.retrieval.corpus import Document as Document
from rarezoo.retrieval.corpus import Query as Query
from rarezoo.retrieval.corpus import read_corpus as read_corpus
from rarezoo.retrieval.corpus import read_qrels as read_qrels
from rarezoo.retrieval.corpus import read_queries as read_queries
from rarezoo.retrieval.encoding import encode_corpus as encode_corpus
from rarezoo.retrieval.evaluation import evaluate_run as evaluate_run
from rarezoo.retrieval.evaluation import evaluate_run_per_query as evaluate_run_per_query
from rarezoo.retrieval.evaluation import rank_documents as rank_documents
from rarezoo.retrieval.evaluation import read_run as read_run
from rarezoo.retrieval.evaluation import write_run as write_run
from rarezoo.retrieval.fingerprint import model_fingerprint as model_fingerprint
from rarezoo.retrieval.inference_free import InferenceFreeQueryEncoder as InferenceFreeQueryEncoder
from rarezoo.retrieval.inference_free import inverse_document_frequencies as inverse_document_frequencies
from rarezoo.retrieval.interop import export_embeddings as export_embeddings
from rarezoo.retrieval.interop import import_embeddings as import_embeddings
from rarezoo.retrieval.kinds import build_index as build_index
from rarezoo.retrieval.kinds import open_embeddings as open_embeddings
from rarezoo.retrieval.kinds import open_index as open_index
from rarezoo.retrieval.language_detection import LanguageDetector as LanguageDetector
from rarezoo.retrieval.multi_vector_embeddings import MultiVectorEmbeddings as MultiVectorEmbeddings
from rarezoo.retrieval.multi_vector_index import MultiVectorIndex as MultiVectorIndex
from rarezoo.retrieval.sparse_embeddings import SparseEmbeddings as SparseEmbeddings
from rarezoo.retrieval.sparse_index import SparseIndex as SparseIndex
