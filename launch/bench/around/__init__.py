"""What is around attention's kernels on TPUs: planning, copies, memory."""
