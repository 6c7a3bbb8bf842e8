"""Clustering in PyTorch, on the device and over the rows of all ranks.

Each rank passes its rows, x (n_r, D), and their sample numbers, index (n_r,), of N samples in all; centroids are equal
on every rank, and sums are all-reduced.
https://arxiv.org/abs/1807.05520 (DeepCluster), https://arxiv.org/abs/1702.08734 (faiss)
"""

from fastssl.clustering.k_means import KMeans, check_clusters, describe, two_means
from fastssl.clustering.power_iteration import pic
from fastssl.clustering.rows import scatter
from fastssl.clustering.sampling import (
    class_weights,
    replacement_order,
    total_weight,
    uniform_order,
    weighted_cross_entropy,
    weighted_mean,
)
from fastssl.clustering.whitening import pca_whiten
