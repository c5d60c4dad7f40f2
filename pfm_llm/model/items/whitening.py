"""The whitening of text embeddings, which is fitted once on a catalogue."""

from dataclasses import dataclass

import torch

_SHRINKAGE = 0.1
_PRIOR_STATES = 100


@dataclass(frozen=True)
class Normaliser:
    """Whitening that is fitted once on a catalogue. A refit would not fit trained tensors.

    Attributes:
        mean: [d] float32.
        basis: [d, d] float32, columns by falling variance; ``(x - mean) @ basis`` is white.
    """

    mean: torch.Tensor
    basis: torch.Tensor

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Whiten states [..., d] to float32 [..., d]."""
        return (states.float() - self.mean) @ self.basis

    def rescaled(self, states: torch.Tensor) -> "Normaliser":
        """The same axes, each with the variance that the states of the fit had there.

        A whitening that is fitted to a few hundred texts takes directions in which these vary by
        chance for directions of low variance. Other texts vary more in them, and scores would be
        noise of these directions. Scaling each axis to the statistics of the new domain is
        adaptive batch normalisation (Li et al. 2016, arXiv 1603.04779). The variance of the new
        states is shrunk towards that of the fit, as if the fit had brought `_PRIOR_STATES` more.

        Args:
            states: float32 [I, d], of another catalogue.
        """
        # The squared norm of a column is 1 / shrunk, and the shrunk ones have the mean of all.
        columns = self.basis.double().square().sum(0)
        shrunk = torch.where(columns > 0, columns.clamp_min(1e-30).reciprocal(), 0.0)
        fitted = ((shrunk - _SHRINKAGE * shrunk.mean()) / (1 - _SHRINKAGE)).clamp_min(0) * columns
        found, weight = self(states).double().var(0, correction=0), len(states) + _PRIOR_STATES
        pooled = (len(states) * found + _PRIOR_STATES * fitted) / weight
        scale = torch.where(pooled > 0, (fitted / pooled.clamp_min(1e-30)).sqrt(), 1.0)
        return Normaliser(self.mean.clone(), self.basis * scale.float())

    def to(self, device: torch.device) -> "Normaliser":
        """The same on another device."""
        return Normaliser(self.mean.to(device), self.basis.to(device))


def fit_normaliser(states: torch.Tensor) -> Normaliser:
    """Fit PCA whitening on item states [I, d].

    Eigenvalues are shrunk towards their mean by a tenth, so that directions in which the catalogue
    hardly varies are not amplified too much.
    """
    states = states.double()
    mean = states.mean(0)
    centred = states - mean
    covariance = centred.T @ centred / max(1, len(states) - 1)
    values, vectors = torch.linalg.eigh(covariance)
    values = values.flip(0).clamp_min(0)
    shrunk = (1 - _SHRINKAGE) * values + _SHRINKAGE * values.mean()
    # A catalogue of equal texts has no variance at all; leave it at zero instead of dividing.
    scale = torch.where(shrunk > 0, shrunk.clamp_min(1e-12).rsqrt(), 0.0)
    # The sign of an eigenvector is arbitrary. It is fixed here, so that all machines agree.
    vectors = vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    basis = vectors * torch.where(largest < 0, -1.0, 1.0) * scale
    return Normaliser(mean.float(), basis.float())
