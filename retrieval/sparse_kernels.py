"""The compiled loops of the inverted index: building its blocks and searching them, term at a time.

A block is the postings of up to 65,536 consecutive documents, ordered by term and, within a term, by document. Numbered
from the start of their block, documents fit into 16 bits: a posting takes 6 bytes with its float32 weight, and the
scores of a block stay in the processor's cache.
"""

import numpy as np
from numba import njit

BLOCK_SIZE = 65536
_STRIP = 64


def _compiled(function):
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba finds no folder that it may write its cache to
        return njit(nogil=True)(function)


@_compiled
def invert_rows(indptr, indices, weights, first_document, cursor, documents, block_weights):
    """Place the postings of some rows of a block; a counting sort, whose counts are `cursor`.

    Args:
        indptr, indices, weights: CSR rows.
        first_document: number of the first row within its block.
        cursor: (num_terms,) int64, where the next posting of each term goes; advanced.
        documents: (postings,) uint16, filled.
        block_weights: (postings,) float32, filled.
    """
    for row in range(indptr.size - 1):
        for entry in range(indptr[row], indptr[row + 1]):
            position = cursor[indices[entry]]
            documents[position] = np.uint16(first_document + row)
            block_weights[position] = weights[entry]
            cursor[indices[entry]] = position + 1


@_compiled
def _worse(score, document, other_score, other_document):
    return score < other_score or (score == other_score and document > other_document)


@_compiled
def _sift_down(scores, documents, size, position):
    """Restore the heap, worst result at the root, below `position`."""
    score, document = scores[position], documents[position]
    while True:
        child = 2 * position + 1
        if child >= size:
            break
        if child + 1 < size and _worse(scores[child + 1], documents[child + 1], scores[child], documents[child]):
            child += 1
        if not _worse(scores[child], documents[child], score, document):
            break
        scores[position], documents[position] = scores[child], documents[child]
        position = child
    scores[position], documents[position] = score, document


@_compiled
def _push(scores, documents, size, score, document):
    """Put a result into the heap; the caller knows that it is better than the worst. Returns the heap's size."""
    if size < scores.size:
        position = size
        while position > 0:
            parent = (position - 1) // 2
            if not _worse(score, document, scores[parent], documents[parent]):
                break
            scores[position], documents[position] = scores[parent], documents[parent]
            position = parent
        scores[position], documents[position] = score, document
        return size + 1
    scores[0], documents[0] = score, document
    _sift_down(scores, documents, size, 0)
    return size


@_compiled
def search_segment(
    accumulator,
    term_offsets,
    documents,
    weights,
    num_documents,
    excluded,
    first_document,
    query_indptr,
    query_indices,
    query_weights,
    top_scores,
    top_documents,
    top_sizes,
):
    """Merge the best documents of one segment into the heaps of the queries.

    Args:
        accumulator: (BLOCK_SIZE,) float32 zeros; zeros again afterwards.
        term_offsets: (blocks, num_terms + 1) int64, positions in `documents` and `weights`.
        documents: (postings,) uint16, numbered within the block.
        weights: (postings,) float32.
        num_documents: of the segment.
        excluded: (num_documents,) uint8, 1 where deleted or filtered out; (0,) when none is.
        first_document: number of the segment's first document in the whole index.
        query_indptr, query_indices, query_weights: CSR rows.
        top_scores: (queries, k) float32, a heap per query, changed.
        top_documents: (queries, k) int64, changed.
        top_sizes: (queries,) int64, how full the heaps are, changed.
    """
    for block in range(term_offsets.shape[0]):
        offsets = term_offsets[block]
        block_start = block * BLOCK_SIZE
        block_length = min(BLOCK_SIZE, num_documents - block_start)
        for query in range(query_indptr.size - 1):
            for entry in range(query_indptr[query], query_indptr[query + 1]):
                term = query_indices[entry]
                start, end = offsets[term], offsets[term + 1]
                _accumulate(accumulator, documents[start:end], weights[start:end], query_weights[entry])
            top_sizes[query] = _collect(
                accumulator,
                block_length,
                excluded,
                block_start,
                first_document + block_start,
                top_scores[query],
                top_documents[query],
                top_sizes[query],
            )
        # Nothing lies there unless the file is damaged; a later search of another index must not find it.
        accumulator[block_length:] = 0


@_compiled
def _accumulate(accumulator, documents, weights, query_weight):
    # Arrays counted from zero: the compiler then knows that no index is negative.
    for posting in range(documents.size):
        accumulator[documents[posting]] += query_weight * weights[posting]


@_compiled
def _collect(accumulator, block_length, excluded, block_start, first_document, scores, documents, size):
    """Take the scores above the worst kept one out of the accumulator, and empty it. Returns the heap's size."""
    threshold = scores[0] if size == scores.size else np.float32(0)
    # Strips of a constant length, which the compiler turns into vector instructions.
    for start in range(0, block_length, _STRIP):
        strip = accumulator[start : start + _STRIP]
        above = np.int32(0)
        for number in range(_STRIP):
            above += np.int32(strip[number] > threshold)
        if above:
            for number in range(min(_STRIP, block_length - start)):
                document = start + number
                score = strip[number]
                if score > threshold and (excluded.size == 0 or excluded[block_start + document] == 0):
                    size = _push(scores, documents, size, score, first_document + document)
                    if size == scores.size:
                        threshold = scores[0]
        strip[:] = 0
    return size


@_compiled
def sort_heaps(top_scores, top_documents, top_sizes):
    """Turn every heap into a list, best result first; of equal scores the earlier document."""
    for query in range(top_sizes.size):
        scores, documents = top_scores[query], top_documents[query]
        for size in range(top_sizes[query] - 1, 0, -1):
            scores[0], scores[size] = scores[size], scores[0]
            documents[0], documents[size] = documents[size], documents[0]
            _sift_down(scores, documents, size, 0)
