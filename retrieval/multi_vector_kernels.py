"""The compiled loops of multi-vector search: residual codes, inverted lists of centroids, maxima over documents.

Everywhere a document is a run of consecutive rows; maxima start at -inf, so that a document whose cosines are all
negative keeps its score, and a document without rows scores -inf.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit


def _compiled(**options: Any) -> Callable:
    def compile_function(function: Callable) -> Callable:
        try:
            return njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # numba finds no folder that it may write its cache to
            return njit(nogil=True, **options)(function)

    return compile_function


@_compiled()
def pack_residuals(vectors, centroids, codes, cutoffs, num_bits, packed):
    """Residual of each vector to its centroid, as bucket numbers: bits LSB first, packed MSB first into bytes.

    Args:
        vectors: (n, dim) float32.
        centroids: (num_centroids, dim) float32.
        codes: (n,) integers.
        cutoffs: (2**num_bits - 1,) float32, ascending; a value equal to a cutoff lies below it.
        num_bits: 1, 2, 4 or 8.
        packed: (n, dim * num_bits // 8) uint8 zeros, filled.
    """
    for row in range(vectors.shape[0]):
        centroid = centroids[codes[row]]
        for column in range(vectors.shape[1]):
            residual = vectors[row, column] - centroid[column]
            bucket = _bucket(residual, cutoffs)
            for bit in range(num_bits):
                position = column * num_bits + bit
                packed[row, position >> 3] |= np.uint8(((bucket >> bit) & 1) << (7 - (position & 7)))


@_compiled()
def _bucket(value, cutoffs):
    """Number of cutoffs below `value`."""
    low, high = 0, cutoffs.size
    while low < high:
        middle = (low + high) // 2
        if cutoffs[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


# Sums may be taken in any order, or the loop over a row would not become vector instructions.
@_compiled(fastmath={"reassoc", "contract"})
def decompress_rows(codes, residuals, centroids, table, starts, lengths, vectors):
    """Centroid plus bucket weights, normalised, of some runs of rows.

    Args:
        codes: (rows,) integers.
        residuals: (rows, dim * num_bits // 8) uint8.
        centroids: (num_centroids, dim) float32.
        table: (256, 8 // num_bits) float32, the weights that one byte holds.
        starts: (runs,) int64, first rows.
        lengths: (runs,) int64, numbers of rows.
        vectors: (sum of lengths, dim) float32, filled.
    """
    values = table.shape[1]
    target = 0
    for run in range(starts.size):
        for row in range(starts[run], starts[run] + lengths[run]):
            centroid, packed, vector = centroids[codes[row]], residuals[row], vectors[target]
            for byte in range(packed.size):
                for value in range(values):
                    column = byte * values + value
                    vector[column] = centroid[column] + table[packed[byte], value]
            squares = np.float32(0)
            for column in range(vector.size):
                squares += vector[column] * vector[column]
            scale = np.float32(1) / max(np.float32(np.sqrt(squares)), np.float32(1e-12))
            for column in range(vector.size):
                vector[column] *= scale
            target += 1


@_compiled()
def invert_codes(codes, token_offsets, cell_offsets, cell_documents, last_document):
    """Fill, or with an empty `cell_documents` count, the inverted lists: the distinct documents of every cell.

    Args:
        codes: (tokens,) integers, the cell of each token.
        token_offsets: (documents + 1,) int64.
        cell_offsets: (num_cells + 1,) int32; counting: zeros, the lengths are added behind the first entry. Filling:
            where the lists begin; advanced to where they end.
        cell_documents: (postings,) uint16, filled; (0,) to count.
        last_document: (num_cells,) int32, all -1; changed.
    """
    counting = cell_documents.size == 0
    for document in range(token_offsets.size - 1):
        for token in range(token_offsets[document], token_offsets[document + 1]):
            cell = codes[token]
            if last_document[cell] == document:
                continue
            last_document[cell] = document
            if counting:
                cell_offsets[cell + 1] += 1
            else:
                cell_documents[cell_offsets[cell]] = document
                cell_offsets[cell] += 1


@_compiled()
def best_cells(scores, count):
    """(num_cells,) uint8: 1 for cells among the `count` best of some query vector; scores (num_cells, vectors)."""
    marks = np.zeros(scores.shape[0], dtype=np.uint8)
    best = np.empty(count, dtype=np.float32)
    cells = np.empty(count, dtype=np.int64)
    for vector in range(scores.shape[1]):
        size = 0
        for cell in range(scores.shape[0]):
            score = scores[cell, vector]
            if size == count and score <= best[size - 1]:
                continue
            if size < count:
                size += 1
            position = size - 1
            while position > 0 and best[position - 1] < score:
                best[position], cells[position] = best[position - 1], cells[position - 1]
                position -= 1
            best[position], cells[position] = score, cell
        for position in range(size):
            marks[cells[position]] = 1
    return marks


@_compiled()
def mark_documents(marked_cells, cell_offsets, cell_documents, eligible, marks):
    """Set `marks` (documents,) uint8 to 1 for the eligible documents in the lists of the marked cells."""
    for cell in range(marked_cells.size):
        if marked_cells[cell]:
            for posting in range(cell_offsets[cell], cell_offsets[cell + 1]):
                document = cell_documents[posting]
                marks[document] = eligible[document]


@_compiled()
def approximate_scores(cell_scores, codes, starts, lengths, scores):
    """MaxSim of one query with the centroids of the documents' vectors in place of the vectors.

    Args:
        cell_scores: (num_cells, query vectors) float32.
        codes: (tokens,) integers.
        starts: (documents,) int64, first tokens.
        lengths: (documents,) int64, numbers of tokens.
        scores: (documents,) float32, filled.
    """
    best = np.empty(cell_scores.shape[1], dtype=np.float32)
    for document in range(starts.size):
        best[:] = -np.inf
        for token in range(starts[document], starts[document] + lengths[document]):
            row = cell_scores[codes[token]]
            for vector in range(best.size):
                if row[vector] > best[vector]:
                    best[vector] = row[vector]
        total = np.float32(0)
        for vector in range(best.size):
            total += best[vector]
        scores[document] = total


@_compiled()
def max_sim(products, lengths, query_offsets, scores):
    """Maxima over each document's rows, summed over each query's columns.

    Args:
        products: (document vectors, query vectors) float32, the inner products.
        lengths: (documents,) int64, numbers of rows; they add up to all rows.
        query_offsets: (queries + 1,) int64, where the columns of each query begin.
        scores: (queries, documents) float32, filled.
    """
    best = np.empty(products.shape[1], dtype=np.float32)
    start = 0
    for document in range(lengths.size):
        best[:] = -np.inf
        for token in range(start, start + lengths[document]):
            row = products[token]
            for vector in range(best.size):
                if row[vector] > best[vector]:
                    best[vector] = row[vector]
        start += lengths[document]
        for query in range(query_offsets.size - 1):
            total = np.float32(0)
            for vector in range(query_offsets[query], query_offsets[query + 1]):
                total += best[vector]
            scores[query, document] = total
