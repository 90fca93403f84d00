"""DeepSpeed's ZeRO, where an accelerate config asks for it.

Its engine keeps the optimizer, whose flat partitions the processes share out (stages 1 and 2), and the parameters with it
(stage 3). Everything leaves here whole and under the model's own names: a checkpoint does not tell what trained it.
"""
