"""Pairwise masks: the server learns the sum of a cohort's updates, and no single one.

The protocol is that of Bonawitz et al. 2017 (CCS, "Practical Secure Aggregation for
Privacy-Preserving Machine Learning", eprint.iacr.org/2017/281, figure 4; a short first version is
arXiv 1611.04482) with signed keys, double masking and a consistency check. A client masks with some
of the others only, as in Bell et al. 2020 (CCS, "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead", eprint.iacr.org/2020/704), and shares its secrets with all of them.
With x_u the words of client u's update, b_u a seed of its own and s_uv what u and v agree on, it
sends

    y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)        modulo 2^32,

with v among its neighbours. In the sum over clients the masks of pairs cancel. Each client shares
b_u and its mask key by Shamir's scheme. Of a client whose words arrived the others reveal their
shares of b_u, of one that vanished those of its mask key, and never both of one client.

`client.masked_client` is a client's side, `server.masked_round` the server's. Here is what both
need: `messages`, `agreement` (keys), `shares`, `neighbours` (who masks with whom), `words`.
"""
