"""int8 on the CPUs that a file will meet: which sums of products a kind of CPU can't hold, and what comes of it.

x86 without VNNI adds up two products of 8 bits in 16 bits, and saturates (`vpmaddubsw`): a file whose weights allow
such a sum computes something else there than on a CPU with VNNI.
"""
