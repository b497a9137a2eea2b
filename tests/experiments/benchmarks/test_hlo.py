"""How compiled programs are read."""

import dataclasses

from experiments.benchmarks import hlo

TEXT = """
%inside (p: f32[8,5]) -> f32[8,5] {
  %copy.8 = f32[8,5]{0,1} copy(%p)
  ROOT %pad.9 = f32[8,6]{1,0} pad(%copy.8, %zero), padding=0_0x0_1
}

%body (p: f32[4,8]) -> f32[4,8] {
  %dot.1 = f32[4,8]{1,0} dot(%p, %q), lhs_contracting_dims={1}
}
ENTRY %main {
  %fused = f32[8,6]{1,0} fusion(%a), kind=kLoop, calls=%inside
  %copy.2 = f32[8,5]{0,1:T(8,128)} copy(%a)
  %copy.3 = f32[3]{0} copy(%b)
  ROOT %c = (bf16[16,4]{1,0}, u8[64]{0}) custom-call(%a), custom_call_target="__cublas$lt$matmul"
  %d = f32[4]{0} custom-call(%a), custom_call_target="topk"
  %g = bf16[8,6]{1,0} all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%a), replica_groups={{0,1,2,3},{4,5,6,7}}
  %r = f32[6]{0} reduce-scatter(%a), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %t = f32[6]{0} all-reduce(%a), replica_groups=mesh['data'=2,'model'=4] {'model'}, dimensions={0}
  %u = f32[6]{0} all-reduce(%a), replica_groups=mesh['a'=2,'b'=3] {'a','b'}, to_apply=%sum
  %m = (f32[10]{0}, f32[]) all-reduce(%a, %b), replica_groups={}
  %n = f32[10]{0} all-reduce(%a), replica_groups={{0},{1}}
}
"""


@dataclasses.dataclass
class FakeCompiled:
    text: str

    def as_text(self):
        return self.text

    def memory_analysis(self):
        sizes = ("temp", "argument", "output", "alias")
        return type("Sizes", (), {f"{name}_size_in_bytes": 7 for name in sizes})


def test_facts_of_a_program():
    found = hlo.facts(FakeCompiled(TEXT), 40)
    assert found.dots == 2 and found.temporary_bytes == 7
    assert found.large_moves == {"copy": 1, "pad": 1}


def test_collectives_of_a_program():
    found = hlo.collectives(FakeCompiled(TEXT), 8)
    assert [(c.kind, c.size, c.devices) for c in found] == [
        ("all-gather", 96, 4),
        ("all-gather", 32, 4),
        ("reduce-scatter", 24, 2),
        ("all-reduce", 24, 4),
        ("all-reduce", 24, 6),
        ("all-reduce", 44, 8),
    ]
    assert [c.sent for c in found] == [72, 24, 24, 36, 40, 77]
