"""Classes by logistic regression on frozen vectors."""

from typing import cast

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

_ITERATIONS = 1000


def logistic_classes(
    train: NDArray[np.float32], labels: NDArray[np.int64], queries: NDArray[np.float32]
) -> NDArray[np.int64]:
    """What multinomial logistic regression says of vectors.

    Channels are standardised on the training vectors; the L2 penalty is scikit-learn's own (C = 1). The protocol of
    :mod:`theia.scoring.classification`; nothing in it is chosen by the score, and nothing is left to chance. It is
    fitted until it has converged; scikit-learn warns if that takes more than a thousand iterations.

    Args:
        train: Shape ``(n, C)``.
        labels: Class index of each, shape ``(n,)``.
        queries: Shape ``(m, C)``.

    Returns:
        Class indices, shape ``(m,)``.
    """
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_ITERATIONS))
    return cast(NDArray[np.int64], probe.fit(train, labels).predict(queries))
