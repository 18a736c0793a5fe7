"""Generation: the order of operations, randomness, guidance and cache commits."""

from ardiff.pipelines.pipeline_ardiff import ARDiffPipeline
from ardiff.pipelines.pipeline_output import ARDiffPipelineOutput, ARDiffStep


__all__ = ["ARDiffPipeline", "ARDiffPipelineOutput", "ARDiffStep"]
