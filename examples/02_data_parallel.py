"""The same loop in several processes: DistributedDataParallel around the loss, which runs student and teacher.

    torchrun --nproc-per-node 2 examples/02_data_parallel.py BUNDLE

Random weights and images: what is shown is that all processes end with one student, which is exported by the first.
"""

import sys

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import faqd

distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)  # one network everywhere
teacher = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
).eval()
images = torch.randint(0, 256, (64, 3, 8, 8)) / 255

student = faqd.prepare(teacher, images[:2], faqd.QuantConfig(weights=4, activations=4))
faqd.calibrate(student, images)
loss = DistributedDataParallel(faqd.DistillationLoss(teacher, student))
optimizer = torch.optim.Adam(student.parameters(), 1e-3)
for _ in range(20):
    batch = images[torch.randint(64, (16,), generator=torch.Generator().manual_seed(rank))]  # other images in each
    optimizer.zero_grad()
    loss(batch).backward()
    optimizer.step()

weights = nn.utils.parameters_to_vector(student.parameters()).detach()
everywhere = [torch.empty_like(weights) for _ in range(distributed.get_world_size())]
distributed.all_gather(everywhere, weights)
if rank == 0:
    print("one student:", all(torch.equal(weights, other) for other in everywhere))
    faqd.export(student, sys.argv[1], images)
    print("proved:", sys.argv[1])
distributed.barrier()  # a process that leaves while another still works may be torn down in the middle of its threads
del loss  # it holds the group, whose threads end with the last that does
distributed.destroy_process_group()
