"""OneFlow's VariableMetaInfo message, built with protobuf from a descriptor."""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from trainer.importing import oneflow


def message():
    """Return OneFlow's VariableMetaInfo class, as its .proto file defines it."""
    file = descriptor_pb2.FileDescriptorProto(name="variable.proto", package="oneflow")
    kinds = file.enum_type.add(name="DataType")
    kinds.value.add(name="kInvalidDataType", number=0)
    for name, (number, _) in oneflow.KINDS.items():
        kinds.value.add(name=name, number=number)
    field = descriptor_pb2.FieldDescriptorProto
    shape = file.message_type.add(name="ShapeProto").field
    shape.add(name="dim", number=1, type=field.TYPE_INT64, label=field.LABEL_REPEATED)
    info = file.message_type.add(name="VariableMetaInfo").field
    for name, number, kind, of in (
        ("shape", 2, field.TYPE_MESSAGE, ".oneflow.ShapeProto"),
        ("data_type", 3, field.TYPE_ENUM, ".oneflow.DataType"),
    ):
        info.add(name=name, number=number, type=kind, type_name=of, label=field.LABEL_REQUIRED)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("oneflow.VariableMetaInfo"))


Info = message()
