package sanity

// Our .proto files are written by hand, so the wire format rests on them having no slip. These tests compare them
// with what the specification and kubelet publish, as compiled descriptors: layout and comments may differ, nothing
// else.

import (
	"context"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/bufbuild/protocompile"
	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/reflect/protoreflect"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

func TestProtoFilesSayWhatIsPublished(t *testing.T) {
	published := map[string]protoreflect.FileDescriptor{
		"csi.proto":                csi.File_csi_proto,
		"pluginregistration.proto": registration.File_staging_src_k8s_io_kubelet_pkg_apis_pluginregistration_v1_api_proto,
	}
	for name, theirs := range published {
		t.Run(name, func(t *testing.T) {
			for _, difference := range differences(compile(t, readProto(t, name)), theirs) {
				t.Error(difference)
			}
		})
	}
}

// A comparison that finds nothing proves nothing unless it can find something: each row alters the text of csi.proto
// and names all that must be reported.
func TestProtoAlterationsAreFound(t *testing.T) {
	text := readProto(t, "csi.proto")
	for _, row := range []struct {
		alteration, old, new string
		reported             []string
	}{
		{"a field gets another number", "int64 required_bytes = 1;", "int64 required_bytes = 9;", []string{"csi.v1.CapacityRange.required_bytes"}},
		{"a field gets another kind", "int64 required_bytes = 1;", "int32 required_bytes = 1;", []string{"csi.v1.CapacityRange.required_bytes"}},
		{"a field is renamed", "int64 required_bytes = 1;", "int64 needed_bytes = 1;", []string{"csi.v1.CapacityRange.needed_bytes", "csi.v1.CapacityRange.required_bytes"}},
		{"a field is left out", "int64 required_bytes = 1;", "", []string{"csi.v1.CapacityRange.required_bytes"}},
		{"a field is added", "int64 required_bytes = 1;", "int64 required_bytes = 1; int64 x = 9;", []string{"csi.v1.CapacityRange.x"}},
		{"a repeated field becomes single", "repeated string mount_flags = 2;", "string mount_flags = 2;", []string{"csi.v1.VolumeCapability.MountVolume.mount_flags"}},
		{"a single field becomes optional", "string fs_type = 1;", "optional string fs_type = 1;", []string{"csi.v1.VolumeCapability.MountVolume.fs_type"}},
		{"a map gets another value type", "map<string, string> segments = 1;", "map<string, bytes> segments = 1;", []string{"csi.v1.Topology.SegmentsEntry.value", "csi.v1.Topology.segments"}},
		{"a message field gets another type", "SnapshotSource snapshot = 1;", "VolumeSource snapshot = 1;", []string{"csi.v1.VolumeContentSource.snapshot"}},
		{"an enum field gets another type", "VolumeHealthErrorType status = 1;", "StorageHealthErrorType status = 1;", []string{"csi.v1.VolumeHealth.VolumeHealthEntry.status"}},
		{"a field leaves its oneof", "    VolumeSource volume = 2;\n  }", "  }\n  VolumeSource volume = 2;", []string{"csi.v1.VolumeContentSource.volume"}},
		{"an enum value gets another number", "DATA_LOSS = 3;", "DATA_LOSS = 4;", []string{"csi.v1.DATA_LOSS"}},
		{"an enum value is left out", "DATA_LOSS = 3;", "", []string{"csi.v1.DATA_LOSS"}},
		{"a reserved number of an enum is freed", "reserved 11;", "", []string{"csi.v1.ControllerServiceCapability.RPC.Type"}},
		{"a reserved number of a message is freed", "repeated VolumeUsage usage = 1;\n  reserved 2;", "repeated VolumeUsage usage = 1;", []string{"csi.v1.NodeGetVolumeStatsResponse"}},
		{"a secret is not marked", "map<string, string> secrets = 1 [(csi_secret) = true];", "map<string, string> secrets = 1;", []string{"csi.v1.NodeGetStorageHealthRequest.secrets"}},
		{"something else is marked secret", "int64 required_bytes = 1;", "int64 required_bytes = 1 [(csi_secret) = true];", []string{"csi.v1.CapacityRange.required_bytes"}},
		{"a message is not marked alpha", "message VolumeHealth {\n  option (alpha_message) = true;", "message VolumeHealth {", []string{"csi.v1.VolumeHealth"}},
		{"an enum value is not marked alpha", "GET_STORAGE_HEALTH = 8 [(alpha_enum_value) = true];", "GET_STORAGE_HEALTH = 8;", []string{"csi.v1.NodeServiceCapability.RPC.GET_STORAGE_HEALTH"}},
		{"a service is not marked alpha", "option (alpha_service) = true;", "", []string{"csi.v1.SnapshotMetadata"}},
		{"a method is not marked alpha", "(GetSnapshotResponse) { option (alpha_method) = true; }", "(GetSnapshotResponse);", []string{"csi.v1.Controller.GetSnapshot"}},
		{"a method takes something else", "rpc Probe(ProbeRequest)", "rpc Probe(ProbeResponse)", []string{"csi.v1.Identity.Probe"}},
		{"a method no longer streams", "returns (stream GetMetadataDeltaResponse)", "returns (GetMetadataDeltaResponse)", []string{"csi.v1.SnapshotMetadata.GetMetadataDelta"}},
		{"a method is left out", "rpc Probe(ProbeRequest) returns (ProbeResponse);", "", []string{"csi.v1.Identity.Probe"}},
		{"an extension gets another number", "bool csi_secret = 1059;", "bool csi_secret = 1058;", []string{"csi.v1.csi_secret"}},
		{"an option of the file is left out", "option go_package = \"github.com/container-storage-interface/spec/lib/go/csi\";", "", []string{"csi.v1"}},
	} {
		t.Run(row.alteration, func(t *testing.T) {
			if !strings.Contains(text, row.old) {
				t.Fatalf("csi.proto no longer contains %q: adapt this row", row.old)
			}
			found := differences(compile(t, strings.Replace(text, row.old, row.new, 1)), csi.File_csi_proto)
			if len(found) != len(row.reported) {
				t.Fatalf("want one report for each of %q, got %q", row.reported, found)
			}
			for i, name := range row.reported {
				if !strings.HasPrefix(found[i], name+": ") {
					t.Errorf("want a report on %s, got %q", name, found[i])
				}
			}
		})
	}
}

// differences compares two files in both directions and names each thing that only one of them has, or that they
// declare differently, in the order of the names.
func differences(ours, theirs protoreflect.FileDescriptor) []string {
	our, their := declarations(ours), declarations(theirs)
	names := maps.Clone(our)
	maps.Copy(names, their)
	var found []string
	for _, name := range slices.Sorted(maps.Keys(names)) {
		// A name that one side lacks reads as the empty declaration, which nothing present has.
		if our[name] != their[name] {
			found = append(found, fmt.Sprintf("%s: ours is %q, published is %q", name, our[name], their[name]))
		}
	}
	return found
}

// declarations maps the full name of everything in the file to one line that says all there is to know of it. Map
// fields appear twice, as the field and as the message that protobuf makes for their entries.
func declarations(file protoreflect.FileDescriptor) map[string]string {
	found := map[string]string{}
	add := func(d protoreflect.Descriptor, words ...any) {
		found[string(d.FullName())] = strings.TrimSpace(fmt.Sprintln(append(words, options(d))...))
	}
	addEnums := func(enums protoreflect.EnumDescriptors) {
		for enum := range all(enums) {
			add(enum, "enum, reserved", ranges(enum.ReservedRanges()), ranges(enum.ReservedNames()))
			for value := range all(enum.Values()) {
				add(value, "value", value.Number(), "of", enum.FullName())
			}
		}
	}
	addExtensions := func(extensions protoreflect.ExtensionDescriptors) {
		for extension := range all(extensions) {
			add(extension, "extension of", extension.ContainingMessage().FullName(), field(extension))
		}
	}
	var addMessages func(protoreflect.MessageDescriptors)
	addMessages = func(messages protoreflect.MessageDescriptors) {
		for message := range all(messages) {
			add(message, "message, reserved", ranges(message.ReservedRanges()), ranges(message.ReservedNames()),
				"extensible", ranges(message.ExtensionRanges()))
			for f := range all(message.Fields()) {
				add(f, field(f))
			}
			addMessages(message.Messages())
			addEnums(message.Enums())
			addExtensions(message.Extensions())
		}
	}
	add(file, "package,", file.Syntax())
	addMessages(file.Messages())
	addEnums(file.Enums())
	addExtensions(file.Extensions())
	for service := range all(file.Services()) {
		add(service, "service")
		for method := range all(service.Methods()) {
			add(method, "method from", method.Input().FullName(), "to", method.Output().FullName(),
				"streams", method.IsStreamingClient(), method.IsStreamingServer())
		}
	}
	return found
}

// field says everything about a field but its options.
func field(f protoreflect.FieldDescriptor) string {
	words := []any{f.Cardinality(), fieldType(f), "=", f.Number(), "json", f.JSONName(), "packed", f.IsPacked(), "presence", f.HasPresence()}
	if f.HasOptionalKeyword() {
		words = append(words, "explicitly optional")
	}
	if oneof := f.ContainingOneof(); oneof != nil {
		words = append(words, "in oneof", oneof.Name())
	}
	return strings.TrimSpace(fmt.Sprintln(words...))
}

func fieldType(f protoreflect.FieldDescriptor) string {
	switch {
	case f.IsMap():
		return fmt.Sprintf("map<%s, %s>", fieldType(f.MapKey()), fieldType(f.MapValue()))
	case f.Message() != nil:
		return string(f.Message().FullName())
	case f.Enum() != nil:
		return string(f.Enum().FullName())
	default:
		return f.Kind().String()
	}
}

// options lists the options set on a thing, custom ones like csi_secret included. Whatever the descriptor holds but
// cannot name is shown as bytes, so that it can't go unnoticed on one side.
func options(d protoreflect.Descriptor) []string {
	set := []string{}
	message := d.Options().ProtoReflect()
	message.Range(func(f protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		set = append(set, fmt.Sprintf("%s=%v", f.FullName(), value))
		return true
	})
	if unknown := message.GetUnknown(); len(unknown) > 0 {
		set = append(set, "unknown="+hex.EncodeToString(unknown))
	}
	slices.Sort(set) // Range has no order
	return set
}

// list is what all of protoreflect's lists have in common.
type list[T any] interface {
	Len() int
	Get(int) T
}

func all[T any](l list[T]) func(yield func(T) bool) {
	return func(yield func(T) bool) {
		for i := range l.Len() {
			if !yield(l.Get(i)) {
				return
			}
		}
	}
}

// ranges collects reserved numbers or names; their order in the file means nothing.
func ranges[T any](l list[T]) []string {
	found := []string{}
	for r := range all(l) {
		found = append(found, fmt.Sprint(r))
	}
	slices.Sort(found)
	return found
}

func readProto(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile("../../proto/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func compile(t *testing.T, text string) protoreflect.FileDescriptor {
	t.Helper()
	compiler := protocompile.Compiler{Resolver: protocompile.WithStandardImports(&protocompile.SourceResolver{
		Accessor: protocompile.SourceAccessorFromMap(map[string]string{"ours.proto": text}),
	})}
	files, err := compiler.Compile(context.Background(), "ours.proto")
	if err != nil {
		t.Fatalf("cannot compile: %v", err)
	}
	return files[0]
}
